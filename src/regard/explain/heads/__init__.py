"""What single heads do and what they are worth."""
