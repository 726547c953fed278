"""What a person reads about a model or a run: summary, sizes, operations, pictures, one HTML page."""
