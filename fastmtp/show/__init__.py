"""What people look at: charts and markdown tables."""
