"""What `wbdit push --with_code` puts into a repository: modules that only say where the code is."""
