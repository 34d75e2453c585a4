"""Speed, always as a ratio against another backend in the same run on the same machine."""
