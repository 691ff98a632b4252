"""Results as documents, tables, plots and pages."""
