"""Recurrent layers of transformers models over our operators."""
