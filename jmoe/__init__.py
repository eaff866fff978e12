"""jmoe."""
