"""Times: N+1 decreasing times from t=1 (noise) to t=0 (data).

A grid whose nodes cannot reach t=0 (Karras, log-SNR) puts N nodes between t=1 and the process's ``t_min`` and ends with
one jump to 0. Where log-SNR is infinite at t=1 (flows), the grid is laid from 1 - t_min and its first node set to 1.
"""
