"""What the stand-in has in place of sd-scripts' library."""
