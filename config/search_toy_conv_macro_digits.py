# A conv-macro space of 256 networks on 8 x 8 digits, on a laptop: no download, no GPU.
# python train_search.py config/search_toy_conv_macro_digits.py config/drnas.py --benchmark=assets/conv_macro_digits.csv
include('shared/toy_conv_macro_digits.py')
include('shared/digits_search.py')
out_dir = 'out/search_toy_conv_macro_digits'
max_iters = 200
eval_interval = 50
warmup_iters = 20
