"""What people look at: pictures, tables, model cards and run reports."""
