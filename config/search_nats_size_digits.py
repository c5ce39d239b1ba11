# NATS-Bench's sizes on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_nats_size_digits.py config/drnas.py
include('shared/digits_search.py')
space = 'nats_size'
out_dir = 'out/search_nats_size_digits'
affine = False
