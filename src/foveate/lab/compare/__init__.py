"""The main job: mechanisms side by side on one's own model."""
