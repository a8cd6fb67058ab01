"""costbp: what forward-mode AD and zeroth-order training cost against checkpointed backpropagation."""

__version__ = "0.1.0"
