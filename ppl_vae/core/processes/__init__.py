"""Several processes that compute one result, and the messages that they exchange."""
