"""The id tables: what TorchRec is told of each, where their rows are placed, what a served model has in their place."""
