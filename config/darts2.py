# DARTS, second order: the unrolled step, about 2.5 times the cost. It stands after a search config:
# python train_search.py config/search_pydocs.py config/darts2.py
optimizer = 'darts'
order = 2
out_dir += '_darts2'
