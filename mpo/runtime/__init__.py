"""What every command stands on: errors, files, ranks, the terminal. It knows no row, no model."""
