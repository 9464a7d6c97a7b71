"""Training: configs, trainers, the discriminator and its losses, and what monitors a run."""
