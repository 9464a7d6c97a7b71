"""Studies: what the method's parts and controls reach on generated worlds, over seeds, as pages written from JSON."""
