"""What every room uses: errors, the screen, files that appear whole, privacy, remote code, library errors."""
