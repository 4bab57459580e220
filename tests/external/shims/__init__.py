"""What puts our optimizers in the place of those that a suite was written for."""
