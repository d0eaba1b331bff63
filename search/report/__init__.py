"""What a search shows: the Pareto tab and scalars of TensorBoard, pages and tables to share."""
