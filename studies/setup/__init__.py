"""What the studies train: worlds, backbones, arms."""
