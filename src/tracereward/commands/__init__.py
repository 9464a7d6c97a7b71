"""A module for each command: what it does with records and files, without the command line."""
