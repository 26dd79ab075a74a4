"""What is handed over to other libraries, in their own words."""
