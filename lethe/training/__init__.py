"""The trainer that unlearning and attacks share, optimizers, saves."""
