"""What is measured, on which machine."""
