"""Assets: models and data that come with packages."""
