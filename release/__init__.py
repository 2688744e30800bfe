"""What is done before a release: the package and the Hub's kernel are built and checked, and other versions tried."""
