# Retrains what a search on pydocs found, on two CPU cores in about 5 minutes.
# python train_base.py config/base_pydocs.py --arch=out/search_pydocs_drnas/arch.json
out_dir = 'out/base_pydocs'
batch_size = 16
max_iters = 1000
eval_interval = 100
val_portion = 0.1
learning_rate = 2e-3
min_lr = learning_rate / 10
