"""Pictures of slices: what is to be drawn, sd-scripts' generator that draws it, the page of it."""
