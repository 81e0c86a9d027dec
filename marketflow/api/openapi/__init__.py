"""The declaration of each operation, and the OpenAPI description made of them."""
