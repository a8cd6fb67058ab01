"""What theory predicts; tests and reports hold measurements against it."""
