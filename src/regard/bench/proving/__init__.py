"""Small trained models of real library classes, their recipes, and the cases that prove methods on them."""

from regard.bench.proving import tiny as tiny
