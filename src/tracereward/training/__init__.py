"""Training: configs, trainers, the discriminator and its losses, and monitoring."""
