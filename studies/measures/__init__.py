"""What the studies measure."""
