# GDAS. It stands after a search config:
# python train_search.py config/search_pydocs.py config/gdas.py
optimizer = 'gdas'
tau_max = 10.0
tau_min = 0.1
out_dir += '_gdas'
