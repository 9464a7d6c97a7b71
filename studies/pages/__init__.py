"""Pages and figures, written from results."""
