"""What several test modules share: tiny models and runs, a served model, processes that train together."""
