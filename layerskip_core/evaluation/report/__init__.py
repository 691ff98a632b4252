"""Tables, pages and plots of results, and the files that hold them."""
