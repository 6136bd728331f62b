"""Text to video on two CPU cores: moving handwritten digits."""
