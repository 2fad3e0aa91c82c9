"""The parts of the mini family that a transformer stands on, each with its own short training."""
