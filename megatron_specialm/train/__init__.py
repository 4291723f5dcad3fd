"""The training loop: objectives, metrics, validation, early stopping, expert selection and fine-tuning trials."""
