"""Generated problems with expert and mistaken traces, for the quickstart, the studies and the tests."""
