"""What works on the repository and is not shipped with the package."""
