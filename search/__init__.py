"""What is searched: space, genome, recipe, merge operators, population, driver and history."""
