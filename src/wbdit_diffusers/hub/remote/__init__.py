"""What `wbdit push --with_code` puts into a repository: two modules that only say where the code is."""
