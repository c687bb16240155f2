"""`turbolm doctor`: measure every node of an allocation, and name the one that stands out.

task -> examine -> python -m turbolm.doctor (one a node) -> ranks (one a GPU): host, gpus, measure, links
                                                         -> rank 0: compare -> report -> render
"""
