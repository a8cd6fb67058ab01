"""The figures and what a reader should know of each. Apart from the drawing, which takes seconds to
import."""

CAPTIONS = {
    "accuracy_units": "Validation accuracy against forward units: equal abscissa is equal compute. "
    "The dotted line is the majority class.",
    "accuracy_seconds": "Validation accuracy against training seconds on this machine, evaluation "
    "excluded.",
    "loss_units": "Validation loss against forward units.",
    "loss_seconds": "Validation loss against training seconds.",
    "memory_accuracy": "Test accuracy at the end of the budget against the peak memory of a step "
    "beyond weights; bars are the range over seeds. Up and to the left is better.",
}
