"""What a step costs and what fits: counted, traced without weights, timed, in closed form."""
