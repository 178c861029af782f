"""What is made of a store: grids, pages, figures. Nothing in here touches a model."""
