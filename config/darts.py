# DARTS, first order. It stands after a search config:
# python train_search.py config/search_pydocs.py config/darts.py
optimizer = 'darts'
out_dir += '_darts'
