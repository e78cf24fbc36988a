"""What a model costs on a card: bytes, times and accept lengths that pay, by arithmetic alone."""
