"""Output for readers: tables on a terminal, reports in HTML, files of results."""
